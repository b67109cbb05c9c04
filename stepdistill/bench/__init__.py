"""Floor 4: how many steps do I need?"""
