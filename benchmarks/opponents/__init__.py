"""What Splitfire is measured against: how each of them is installed, started and asked. Results of theirs are never typed in."""
