"""What is learned: one folder or file for each objective."""
