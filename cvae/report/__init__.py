"""What shows a trained model to somebody: tables and figures."""
