"""The command line: one module per subcommand, imported without torch."""
