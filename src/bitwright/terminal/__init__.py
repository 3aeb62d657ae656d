"""What the command line shows, and how: `text` is the only way to a terminal."""
