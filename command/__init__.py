"""The command: one file for each verb, which says what it takes and its examples, and does it.

Results go to stdout, notes to stderr. A verb is a module here that has a ``VERB``, and a name in
``command.main.VERBS``. What a verb needs from the packages below is imported when it runs: no verb waits for another's
libraries, and none for them to print its help.
"""
