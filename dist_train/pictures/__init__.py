"""Pictures: grids as PNG, plots, and charts as SVG."""
