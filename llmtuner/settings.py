"""All settings. They work right after a clone without any environment variables; `.env.example` lists those you can set.

With LLMTUNER_ENV=production, `llmtuner/checks.py` refuses settings that would be unsafe on the internet.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from llmtuner import env

BASE_DIR = Path(__file__).resolve().parent.parent
VAR_DIR = Path(env.text("VAR_DIR") or BASE_DIR / "var").resolve()

LLMTUNER_ENV = env.text("LLMTUNER_ENV", "development")  # development, test or production
PRODUCTION = LLMTUNER_ENV == "production"
DEBUG = env.flag("DEBUG")
# Points at which tests kill a process. Never set this outside of tests.
FAILPOINTS = env.text("FAILPOINTS")

# ---- Web ---------------------------------------------------------------------------------------
WEB_PORT = env.number("WEB_PORT", 8420)
# localhost, not 127.0.0.1: passkeys do not work on IP addresses.
PUBLIC_URL = env.text("PUBLIC_URL", f"http://localhost:{WEB_PORT}").rstrip("/")
HTTPS = PUBLIC_URL.startswith("https://")
PUBLIC_HOST = urlsplit(PUBLIC_URL).hostname or "localhost"
LOOPBACK = PUBLIC_HOST in {"localhost", "127.0.0.1", "::1"}
ALLOWED_HOSTS = env.words(
    "ALLOWED_HOSTS", [PUBLIC_HOST, *(["localhost", "127.0.0.1", "[::1]"] if LOOPBACK else [])]
)
CSRF_TRUSTED_ORIGINS = [PUBLIC_URL]
# The number of reverse proxies in front of the web server. 0: X-Forwarded-For and X-Forwarded-Proto are ignored.
TRUSTED_PROXY_COUNT = env.number("TRUSTED_PROXY_COUNT", 0)
# Limits for slow clients and for many connections: see llmtuner/connections.py.
WEB_HEADER_TIMEOUT_S = env.number("WEB_HEADER_TIMEOUT_S", 10.0)
WEB_BODY_TIMEOUT_S = env.number("WEB_BODY_TIMEOUT_S", 30.0)
# 0: no limit. Behind a proxy every connection comes from the proxy's address, so the proxy must set the limit.
WEB_MAX_CONNECTIONS_PER_ADDRESS = env.number(
    "WEB_MAX_CONNECTIONS_PER_ADDRESS", 0 if TRUSTED_PROXY_COUNT else 256
)
if TRUSTED_PROXY_COUNT:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

SECRET_KEY = env.text("SECRET_KEY") or env.stored_secret(VAR_DIR / "secret-key")
SECRET_KEY_FALLBACKS = env.words("SECRET_KEY_FALLBACKS", [])  # old keys, while a key is being rotated

# ---- Application -------------------------------------------------------------------------------
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "allauth",
    "allauth.account",
    "allauth.socialaccount",
    "allauth.socialaccount.providers.google",
    "allauth.mfa",
    "allauth.usersessions",
    "allauth.headless",
    "django_htmx",
    "template_partials",
    # Our apps come last: they unregister models from the admin, which must be registered by then.
    "accounts",
    "jobs",
    "llmtuner.apps.LLMTunerConfig",
]
# Each of these runs without its own thread under ASGI; a test checks that.
MIDDLEWARE = [
    "llmtuner.health.probes",  # before anything that needs the host, a session or HTTPS
    "llmtuner.middleware.request_id",
    "django.middleware.security.SecurityMiddleware",
    "llmtuner.middleware.security_headers",
    "llmtuner.middleware.static_files",
    "llmtuner.api_shell.api_shell",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "llmtuner.middleware.unreachable_stores",
    "llmtuner.middleware.unreadable_input",
]
ROOT_URLCONF = "llmtuner.urls"
ASGI_APPLICATION = "llmtuner.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "accounts.context.site",
            ],
        },
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"
LANGUAGE_CODE = "en"
USE_I18N = True
USE_TZ = True
TIME_ZONE = env.text("TIME_ZONE", "UTC")

# ---- Stores: SQL for users, DynamoDB for work, object storage for bytes, Redis for messages ----
DATABASE_URL = env.url("DATABASE_URL", f"sqlite:///{VAR_DIR}/db.sqlite3", "POSTGRES_PASSWORD")
DATABASES = {"default": env.database(DATABASE_URL)}

AWS_REGION = AWS_S3_REGION_NAME = env.text("AWS_REGION", "us-east-1")
DYNAMODB_PORT = env.number("DYNAMODB_PORT", 8421)
# Empty means AWS, with the credentials that boto3 finds.
_embedded = f"http://127.0.0.1:{DYNAMODB_PORT}"  # the one bin/up runs
DYNAMODB_ENDPOINT = env.text("DYNAMODB_ENDPOINT", _embedded)
# Signs requests to the embedded server. Empty for all other servers: AWS has its own credentials, and DynamoDB Local needs
# none.
DYNAMODB_SECRET = env.text("DYNAMODB_SECRET") or (
    env.stored_secret(VAR_DIR / "dynamodb-secret") if _embedded == DYNAMODB_ENDPOINT else ""
)
DYNAMODB_TABLE_PREFIX = env.text("DYNAMODB_TABLE_PREFIX", "llmtuner-")

AWS_STORAGE_BUCKET_NAME = env.text("AWS_STORAGE_BUCKET_NAME")  # empty: VAR_DIR/objects
AWS_S3_ENDPOINT_URL = env.text("AWS_S3_ENDPOINT_URL") or None
AWS_S3_SIGNATURE_VERSION = "s3v4"
AWS_DEFAULT_ACL = None
AWS_S3_FILE_OVERWRITE = True  # our keys contain the job and fencing token, so no one else writes to them
AWS_QUERYSTRING_EXPIRE = 600
if AWS_STORAGE_BUCKET_NAME:
    _objects = {"BACKEND": "storages.backends.s3.S3Storage"}
else:
    _objects = {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {"location": VAR_DIR / "objects", "base_url": None, "file_permissions_mode": 0o600},
    }

REDIS_PORT = env.number("REDIS_PORT", 8422)
REDIS_URL = (
    env.url("REDIS_URL", "", "REDIS_PASSWORD")
    or (
        f"redis://:{env.stored_secret(VAR_DIR / 'redis-password')}@127.0.0.1:{REDIS_PORT}/0"  # the one bin/up runs
    )
)
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": REDIS_URL,
        "KEY_PREFIX": "llmtuner",
        "OPTIONS": {"socket_timeout": 3, "socket_connect_timeout": 3},
    }
}

# ---- Static files ------------------------------------------------------------------------------
STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
STATICFILES_DIRS = [BASE_DIR / "static"]
# Production serves what `collectstatic` wrote (hashed names, compressed); elsewhere files are served from their folders.
WHITENOISE_USE_FINDERS = not PRODUCTION
WHITENOISE_AUTOREFRESH = DEBUG
WHITENOISE_MAX_AGE = 0 if DEBUG else 300
_static = "whitenoise.storage.CompressedManifestStaticFilesStorage"
if not PRODUCTION:
    _static = "django.contrib.staticfiles.storage.StaticFilesStorage"
STORAGES = {"default": _objects, "staticfiles": {"BACKEND": _static}}

# ---- Users -------------------------------------------------------------------------------------
AUTH_USER_MODEL = "accounts.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
PASSWORD_HASHERS = [
    "django.contrib.auth.hashers.Argon2PasswordHasher",
    "django.contrib.auth.hashers.PBKDF2PasswordHasher",
]
_validation = "django.contrib.auth.password_validation"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"{_validation}.UserAttributeSimilarityValidator", "OPTIONS": {"user_attributes": ["email"]}},
    {"NAME": f"{_validation}.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": f"{_validation}.CommonPasswordValidator"},
]
LOGIN_URL = "account_login"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "account_login"

EMAIL_URL = env.url("EMAIL_URL", "", "EMAIL_PASSWORD")
# Without a mail server, emails are written to the log, where the administrator can find the codes.
EMAIL_BACKEND = "django.core.mail.backends.console.EmailBackend"
if EMAIL_URL:
    globals().update(env.mail(EMAIL_URL))
DEFAULT_FROM_EMAIL = SERVER_EMAIL = env.text("DEFAULT_FROM_EMAIL", f"LLM Tuner <noreply@{PUBLIC_HOST}>")

ALLAUTH_TRUSTED_PROXY_COUNT = TRUSTED_PROXY_COUNT
ACCOUNT_ADAPTER = "accounts.adapters.AccountAdapter"
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*"]
ACCOUNT_DEFAULT_HTTP_PROTOCOL = "https" if HTTPS else "http"
ACCOUNT_EMAIL_SUBJECT_PREFIX = "LLM Tuner: "
ACCOUNT_EMAIL_NOTIFICATIONS = bool(EMAIL_URL)
# On a laptop without a mail server, nobody could receive the code.
ACCOUNT_EMAIL_VERIFICATION = "mandatory" if EMAIL_URL or not LOOPBACK else "none"
ACCOUNT_EMAIL_VERIFICATION_BY_CODE_ENABLED = ACCOUNT_EMAIL_VERIFICATION == "mandatory"
ACCOUNT_EMAIL_VERIFICATION_SUPPORTS_RESEND = True
ACCOUNT_PASSWORD_RESET_BY_CODE_ENABLED = True
ACCOUNT_CHANGE_EMAIL = True
ACCOUNT_PREVENT_ENUMERATION = "strict"  # even without email: see AccountAdapter.save_user
ACCOUNT_LOGIN_ON_GET = ACCOUNT_LOGOUT_ON_GET = ACCOUNT_CONFIRM_EMAIL_ON_GET = False
ACCOUNT_LOGOUT_ON_PASSWORD_CHANGE = (
    False  # after a password change, this device stays signed in and all others are signed out
)
ACCOUNT_REAUTHENTICATION_REQUIRED = True
ACCOUNT_REAUTHENTICATION_TIMEOUT = 600
ACCOUNT_SESSION_REMEMBER = True
# Counted in Redis for all processes: 12 wrong passwords in 10 minutes per IP address, and 10 per account.
ACCOUNT_RATE_LIMITS = {"login_failed": "12/10m/ip,10/10m/key"}
SIGNUP_OPEN = env.flag("SIGNUP_OPEN", True)

# Google: one button, shown if the administrator has registered a client with Google.
GOOGLE_CLIENT_ID = env.text("GOOGLE_CLIENT_ID")
# AUTHORIZE_URL=…,ACCESS_TOKEN_URL=…: another provider, for tests
GOOGLE_ENDPOINTS = env.pairs("GOOGLE_ENDPOINTS")
SOCIALACCOUNT_ADAPTER = "accounts.adapters.SocialAccountAdapter"
SOCIALACCOUNT_LOGIN_ON_GET = False
SOCIALACCOUNT_STORE_TOKENS = False
SOCIALACCOUNT_AUTO_SIGNUP = True
SOCIALACCOUNT_EMAIL_AUTHENTICATION = False
SOCIALACCOUNT_PROVIDERS = {"google": GOOGLE_ENDPOINTS}

MFA_ADAPTER = "accounts.adapters.MFAAdapter"
MFA_SUPPORTED_TYPES = ["totp", "webauthn", "recovery_codes"]
MFA_PASSKEY_LOGIN_ENABLED = True
MFA_FORMS = {"add_webauthn": "accounts.forms.AddPasskeyForm"}
MFA_ALLOW_UNVERIFIED_EMAIL = ACCOUNT_EMAIL_VERIFICATION == "none"  # where addresses cannot be verified
MFA_TOTP_ISSUER = "LLM Tuner"
MFA_WEBAUTHN_ALLOW_INSECURE_ORIGIN = not HTTPS and LOOPBACK  # browsers allow passkeys on http://localhost

# Programs sign in with allauth's headless app client, whose access tokens are valid for /v1.
HEADLESS_CLIENTS = ("app",)
HEADLESS_TOKEN_STRATEGY = "accounts.adapters.TokenStrategy"  # noqa: S105  a class, not a secret
HEADLESS_JWT_ALGORITHM = "HS256"  # signed with SECRET_KEY; nobody else needs to verify it
HEADLESS_JWT_ACCESS_TOKEN_EXPIRES_IN = 300
HEADLESS_JWT_REFRESH_TOKEN_EXPIRES_IN = 30 * 86400
HEADLESS_JWT_STATEFUL_VALIDATION_ENABLED = True  # signing out revokes the token at once
HEADLESS_JWT_ROTATE_REFRESH_TOKEN = True

# ---- Cookies and headers -----------------------------------------------------------------------
_host = "__Host-" if HTTPS else ""
SESSION_COOKIE_NAME = f"{_host}session"
CSRF_COOKIE_NAME = f"{_host}csrf"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS
SESSION_COOKIE_HTTPONLY = CSRF_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_AGE = 14 * 86400
SECURE_SSL_REDIRECT = HTTPS
SECURE_HSTS_SECONDS = 365 * 86400 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = HTTPS
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
CSRF_FAILURE_VIEW = "llmtuner.errors.csrf_failure"
DATA_UPLOAD_MAX_MEMORY_SIZE = 4 * 2**20
DATA_UPLOAD_MAX_NUMBER_FIELDS = 1000

# ---- Jobs: every number can be changed with JOBS_<NAME> ----------------------------------------
JOBS = env.numbers(
    "JOBS",
    {
        # the lease (see the table in jobs/lifecycle/transitions.py)
        "heartbeat_s": 5.0,
        "heartbeat_timeout_s": 3.0,  # per request
        "lease_s": 30.0,
        "self_fence_s": 20.0,  # after this long without a heartbeat, a worker writes nothing until one succeeds
        "reconcile_s": 5.0,
        "watch_gap_s": 10.0,  # an observer that slept longer than this restarts its watch
        "void_after_s": 600.0,
        "audit_s": 3600.0,
        # attempts
        "max_attempts": 10,
        "max_attempts_without_progress": 3,
        # The job fails after this many platform faults in a row without progress: about four hours with the delays below.
        "max_platform_faults": 30,
        "backoff_first_s": 10.0,
        "backoff_max_s": 600.0,
        # events
        "chunk_events": 100,
        "chunk_bytes": 65536,
        "chunk_s": 1.0,
        "max_events": 200_000,
        # the trainer process
        "sigterm_grace_s": 20.0,
        "cancel_grace_s": 10.0,
        # A trainer is stopped if it reports nothing for the time of stall_steps steps, but at least for stall_s. The time of
        # a step is first that of the rehearsal, then it is measured. While it is unknown, and in other phases than training,
        # the limit is at least quiet_s.
        "stall_s": 120.0,
        "stall_steps": 20.0,
        "quiet_s": 1800.0,
        "max_runtime_s": 72 * 3600.0,
        "max_trainer_bytes": 0,  # address space of a trainer; 0 means no limit
        # users
        "max_upload_bytes": 2 * 2**30,
        "max_uploads_per_owner": 4,  # concurrent large uploads per web process, which buffers them on disk
        "max_jobs_per_owner": 20,  # jobs that have not ended
        "max_datasets_per_owner": 1000,
        "max_models_per_owner": 1000,
        "max_stored_bytes_per_owner": 200 * 2**30,
        "max_generations_per_owner": 2,
        "max_streams_per_owner": 20,  # live pages open at once
        "max_webhook_tests_per_owner": 5,  # per minute
        # checks
        "check_timeout_s": 1800.0,
        "check_memory_bytes": 4 * 2**30,
        # generation
        "max_warm_models": 2,
        "generation_timeout_s": 300.0,
        "server_silence_s": 120.0,  # an inference server that is silent this long during a request is restarted
        # the cost of an hour of a worker's time; 0 hides costs
        "price_per_hour": 0.0,
        "signed_url_s": 600,
        "janitor_s": 3600.0,
    },
)
MODEL_CACHE_DIR = Path(env.text("MODEL_CACHE_DIR") or VAR_DIR / "models")
WORK_DIR = Path(env.text("WORK_DIR") or VAR_DIR / "work")
HF_ENDPOINT = env.text("HF_ENDPOINT") or "https://huggingface.co"
HF_TOKEN = env.text("HF_TOKEN")  # used only for models of the catalog and those that HUB_MODELS names
# Hub models that users may fine-tune, as patterns (`Qwen/*`); `public` means all public models, `none` means none.
HUB_MODELS = [name for name in env.words("HUB_MODELS", ["public"]) if name != "none"]
HUB_MAX_GB = env.number("HUB_MAX_GB", 20.0)  # per model
# Names that `/v1` accepts for a model, mapped to its name here: OpenAI's base models, and models fine-tuned there.
BASE_MODEL_ALIASES = env.pairs("BASE_MODEL_ALIASES")
# By default, webhooks go only to public addresses. In a closed network, private addresses and http can be allowed.
WEBHOOKS_ALLOW_PRIVATE = env.flag("WEBHOOKS_ALLOW_PRIVATE")
API_REQUESTS_PER_MINUTE = env.number("API_REQUESTS_PER_MINUTE", 1200)  # per user, over all keys

# ---- Logs --------------------------------------------------------------------------------------
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"request_id": {"()": "llmtuner.middleware.RequestIdFilter"}},
    "formatters": {
        "line": {
            "()": "llmtuner.middleware.OneLine",
            "format": "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s",
        }
    },
    "handlers": {
        "console": {"class": "logging.StreamHandler", "filters": ["request_id"], "formatter": "line"}
    },
    "root": {"handlers": ["console"], "level": env.text("LOG_LEVEL", "INFO")},
    "loggers": {
        "django": {"handlers": [], "propagate": True, "level": "INFO"},
        "botocore": {"level": "WARNING"},
        "boto3": {"level": "WARNING"},
        "urllib3": {"level": "WARNING"},
        "pynamodb": {"level": "WARNING"},
    },
}
