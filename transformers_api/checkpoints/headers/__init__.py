"""What files to convert say of themselves, without torch: a list of models shows it."""
