"""The cost of each linear's error: by expected KL divergence, and by the accuracies that stock measures."""
