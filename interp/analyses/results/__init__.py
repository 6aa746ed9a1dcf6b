"""Results of analyses: tables, trials, statistics, files."""
