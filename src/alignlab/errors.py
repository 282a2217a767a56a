"""What goes wrong by the user's hand: config, data or model -> one line and exit code 2."""


class UserError(ValueError):
    """One line for users: what is wrong, where, why, and what to do. The command line prints it without a traceback."""
