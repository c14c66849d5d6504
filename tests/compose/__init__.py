"""`make test-compose`: compose.yaml brought up in a real Docker engine, hurt, and asked. Some ten minutes; an image is built first."""
