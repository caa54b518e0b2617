"""Write a step's newest tokens into the window."""
