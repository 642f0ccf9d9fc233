#!/bin/sh
# Start MLflow's tracking server with a login. Everything secret comes from the environment:
#
#   MLFLOW_BACKEND_STORE_URI           postgresql://USER:PASSWORD@HOST/DATABASE: runs, models, users
#   MLFLOW_ARTIFACTS_DESTINATION       s3://BUCKET/FOLDER; AWS_* as boto3 reads them (a role, or keys and AWS_ENDPOINT_URL)
#   MLFLOW_AUTH_ADMIN_USERNAME         first user, made when the database has none
#   MLFLOW_AUTH_ADMIN_PASSWORD         of that user, 12 characters or more
#   MLFLOW_FLASK_SERVER_SECRET_KEY     any long random text; the same after a restart and for every replica
#   MLFLOW_SERVER_ALLOWED_HOSTS        names by which clients reach the server, HOST:PORT,...; other names are refused
#   MLFLOW_HOST, MLFLOW_PORT           where to listen: 127.0.0.1 and 5000
#
# Clients never see the bucket's keys: they send artifacts to the server (mlflow-artifacts:), which passes them on.
set -eu
: "${MLFLOW_BACKEND_STORE_URI:?}" "${MLFLOW_ARTIFACTS_DESTINATION:?}" "${MLFLOW_FLASK_SERVER_SECRET_KEY:?}"
: "${MLFLOW_AUTH_ADMIN_USERNAME:?}" "${MLFLOW_AUTH_ADMIN_PASSWORD:?}"

# Users are kept beside the runs. The file holds the database's password, so only we may read it.
umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
export MLFLOW_AUTH_CONFIG_PATH
cat > "$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = READ
database_uri = $(printf '%s' "$MLFLOW_BACKEND_STORE_URI" | sed 's/%/%%/g')
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
END

# Eight processes that run MLflow's own jobs would take 0.7 GB and are not used.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
exec mlflow server --app-name basic-auth --host "${MLFLOW_HOST:-127.0.0.1}" --port "${MLFLOW_PORT:-5000}" \
    --workers "${MLFLOW_WORKERS:-2}" --serve-artifacts
