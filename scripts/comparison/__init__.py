"""Does the regularizer help? What is run (plan), how (execute), and the page that it becomes (page)."""
