"""How well do ways of pointing at a region work, and what do they cost the whole image?"""
