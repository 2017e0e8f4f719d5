"""What a phase kind optimises: one file a family of kinds."""
