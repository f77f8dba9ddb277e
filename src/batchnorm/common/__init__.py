"""What every room may use and no room is about: whole files, errors in one line, users' names, cores."""
