"""The page: files of a browser's, and who is given them. No build step; see ``static/js/app.js``."""
