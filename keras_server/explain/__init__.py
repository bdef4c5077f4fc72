"""Which pixels speak for a label."""
