"""What computes with torch: file merges, live models and analysis on a device."""
