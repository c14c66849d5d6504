"""`splitfire bench serve`: a load of its own making, what came of it, and a page that shows it.

1. *flags* reads what was asked for; *arrivals* plans the requests of one rate, *prompts* draws their tokens.
2. *targets* says whom to ask: a fleet that runs, or fleets of this machine, started and ended in turn.
3. *sweep* goes through rounds, variants and rates; *run* sends one rate's requests, each when it is due, and notes what came when.
4. *statistics* makes rows of it, *verdict* a sentence, *charts* and *page* the report, *tables* what the terminal and `--json` show.
"""
