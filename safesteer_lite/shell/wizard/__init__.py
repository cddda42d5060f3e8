"""The wizard: questions whose answers are a command line, and the menu over a finished run. Questionary is used only here."""
