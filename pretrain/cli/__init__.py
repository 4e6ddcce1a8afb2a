"""The command line: one module for each sub-command, which parses arguments and calls the code."""
