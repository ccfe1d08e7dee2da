"""What a model can do: functions of a model and data that return {name: value}."""
