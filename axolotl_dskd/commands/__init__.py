"""The commands beside `axolotl train`."""
