"""What an optimizer became: a record of a training, its picture, tables in notebooks."""
