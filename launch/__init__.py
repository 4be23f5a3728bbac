"""WHERE a run happens: the command line and the launchers."""
