"""The command line: one thin module per sub-command, each a parser and a call."""
