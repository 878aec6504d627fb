"""What the error of each linear costs: by expected KL divergence, and by the accuracies that stock measures."""
