"""FlexOlmo: train experts apart, merge them, switch each data source on or off."""
