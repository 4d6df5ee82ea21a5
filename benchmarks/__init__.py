"""What training costs, measured: runs with torch and PyYAML alone."""
