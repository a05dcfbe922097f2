"""The command line: the floor above contract, export and run time, which nothing imports."""
