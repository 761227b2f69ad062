"""How evaluate_reconstruction.py and plot_reconstruction.py measure: methods, judges, and tables of their figures."""
