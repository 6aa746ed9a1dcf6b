"""Published methods over heads, one file each, and the score tables that they share."""
