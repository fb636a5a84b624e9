"""Every optimizer that an experiment can name: ours, variants of ours, and other people's."""
