"""Tables over seeds: what is read (runs), what is averaged and compared (rows), and how it is printed (page)."""
