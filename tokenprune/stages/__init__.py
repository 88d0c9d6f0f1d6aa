"""What a stage is written against: base class, configuration, what each hook is shown, what it remembers."""
