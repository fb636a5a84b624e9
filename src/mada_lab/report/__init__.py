"""What was found: tables, statistics, figures, pages."""
