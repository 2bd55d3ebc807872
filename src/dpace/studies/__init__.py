"""The two verbs that do everything: compare and demo."""
