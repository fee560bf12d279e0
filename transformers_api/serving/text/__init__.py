"""Messages to token ids, and token ids to text.

Start reading at ``chat_template.py`` on the way in and ``choice_text.py`` on the way out, which
joins ``detokenizer.py`` and ``stop_strings.py`` for one choice of an answer.
"""
