"""``gunicorn app:app`` and ``python app.py --host 127.0.0.1 --port 5000``."""

if __name__ == "__main__":
    from transformers_api.server.serve import main

    main()
else:
    from wsgi import app as app
