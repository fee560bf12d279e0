#!/usr/bin/env bash
# Install the server or bring it up to date. As root, from a checkout of the project:
#
#   deploy/install.sh [--domain NAME] [--torch cpu|cu130] [--rehearse FOLDER]
#
# --domain    nginx serves https://NAME; needed once
# --torch     the build of torch: for CPUs, or for NVIDIA's driver; cpu, or as it was
# --rehearse  write the files below FOLDER, and only say which commands would be run
#
# Can be run again at any time, and changes only what is not yet as it should be. Settings, keys and
# an nginx.conf that was edited are kept. Requests that are running when the server is restarted
# finish, others wait. If the new release does not answer, the one before comes back.
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."

readonly name=transformers-api
readonly etc=/etc/$name opt=/opt/$name acme=/var/www/acme
readonly units=/etc/systemd/system nginx=/etc/nginx/nginx.conf
readonly health=http://127.0.0.1:5000/healthz
domain="" torch="" root="" previous="" changed="" must_restart=""

main() {
    read_options "$@"
    check_machine
    make_user
    make_settings
    make_release
    make_units
    start_service
    [[ -z $domain ]] || make_proxy
    say "Done."
}

say() { printf '%s\n' "$*"; }

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Run a command that changes more than files below $root.
act() {
    if [[ -n $root ]]; then
        say "would run: $*"
    else
        "$@"
    fi
}

read_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
            --domain | --torch | --rehearse)
                [[ $# -ge 2 ]] || fail "$1 needs a value"
                case $1 in
                    --domain) domain=$2 ;;
                    --torch) torch=$2 ;;
                    --rehearse) root=$(realpath --no-symlinks "$2") ;;
                esac
                shift 2
                ;;
            *) fail "$1 is no option: --domain NAME, --torch cpu|cu130, --rehearse FOLDER" ;;
        esac
    done
    if [[ -z $torch ]]; then
        torch=cpu
        [[ ! -e $root$units/$name.service.d/gpu.conf ]] || torch=cu130
    fi
    [[ -f deploy/torch-$torch.lock ]] || fail "--torch $torch: expected cpu or cu130"
    if [[ -z $domain && -f $root$etc/domain ]]; then
        domain=$(<"$root$etc/domain")
    fi
    [[ -z $domain || $domain =~ ^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$ ]] ||
        fail "--domain $domain is not the name of a machine"
}

check_machine() {
    python3 -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer with venv is needed: apt-get install python3-venv"
    [[ -z $root ]] || return 0
    [[ $EUID -eq 0 ]] || fail "This needs root; --rehearse FOLDER does not"
    local needed=(systemctl curl)
    [[ -z $domain ]] || needed+=(nginx openssl)
    for program in "${needed[@]}"; do
        command -v "$program" >/dev/null || fail "$program is needed: apt-get install $program"
    done
}

make_user() {
    if [[ -n $root ]] || ! getent passwd $name >/dev/null; then
        act useradd --system --user-group --home-dir /var/lib/$name --shell /usr/sbin/nologin $name
    fi
}

# put SOURCE PLACE MODE: a file of ours, whatever was there.
put() {
    if ! cmp --quiet "$1" "$root$2"; then
        say "writing $2"
        install -D --mode="$3" "$1" "$root$2"
        changed=yes
    fi
}

# keep SOURCE PLACE MODE: a file that the operator owns from then on.
keep() {
    [[ -e $root$2 ]] || put "$1" "$2" "$3"
}

make_settings() {
    install --directory --mode=0750 "$root$etc"
    keep deploy/env.example $etc/env 0640
    keep /dev/null $etc/api-keys 0640
    keep /dev/null $etc/hf-token 0600
    [[ -z $domain || $(cat "$root$etc/domain" 2>/dev/null) == "$domain" ]] ||
        printf '%s\n' "$domain" >"$root$etc/domain"
    act chown root:$name $etc $etc/env $etc/api-keys
}

# The same files, the same release.
release_id() {
    {
        find transformers_api -type f -not -path '*/__pycache__/*' -print0
        printf '%s\0' wsgi.py gunicorn.conf.py requirements.lock "deploy/torch-$torch.lock"
    } | LC_ALL=C sort --zero-terminated | xargs --null sha256sum | sha256sum | cut --characters=-12
}

make_release() {
    local id release fresh
    id=$torch-$(release_id)
    release=$opt/releases/$id
    if [[ ! -d $root$release ]]; then
        say "making $release"
        fresh=$opt/releases/.fresh
        rm -rf "$root$fresh"
        mkdir -p "$root$fresh/deploy"
        cp -R transformers_api wsgi.py gunicorn.conf.py docs "$root$fresh"
        cp deploy/env.example "$root$fresh/deploy"
        find "$root$fresh" -name __pycache__ -prune -exec rm -rf {} +
        install_packages $fresh
        mv "$root$fresh" "$root$release"
    fi
    make_kernels "$release"
    if [[ $(readlink "$root$opt/current" || true) != "releases/$id" ]]; then
        previous=$(readlink "$root$opt/current" || true)
        point_to "releases/$id"
        must_restart=yes
    fi
}

install_packages() {
    local pip=("$1/venv/bin/python" -m pip --disable-pip-version-check install --quiet
        --no-deps --require-hashes --only-binary :all:)
    local index=()
    [[ $torch != cpu ]] || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    act python3 -m venv "$1/venv"
    act "${pip[@]}" "${index[@]}" --requirement "deploy/torch-$torch.lock"
    act "${pip[@]}" --requirement requirements.lock
    act "$1/venv/bin/python" -m compileall -q "$1/transformers_api"
}

# Once, half a minute. Without a compiler inference is slower, and nothing else.
make_kernels() {
    compgen -G "$root$1/kernels/*.so" >/dev/null ||
        act env "NATIVE_CACHE=$1/kernels" "$1/venv/bin/python" -m transformers_api kernels ||
        say "With g++ it is faster: apt-get install g++, then this again and a restart."
}

# Replaced in one step: there is no moment without a release.
point_to() {
    ln --symbolic --force --no-dereference "$1" "$root$opt/current.next"
    mv --no-target-directory "$root$opt/current.next" "$root$opt/current"
}

make_units() {
    local drop_in=$units/$name.service.d/gpu.conf
    changed=""
    put deploy/systemd/$name.socket $units/$name.socket 0644
    put deploy/systemd/$name.service $units/$name.service 0644
    if [[ $torch == cpu ]]; then
        rm -f "$root$drop_in"
    else
        put deploy/systemd/gpu.conf "$drop_in" 0644
    fi
    [[ -z $changed ]] || must_restart=yes
    put deploy/$name /usr/local/bin/$name 0755
}

start_service() {
    act systemctl daemon-reload
    act systemctl enable --quiet --now $name.socket
    act systemctl enable --quiet $name.service
    local how=start
    [[ -z $must_restart ]] || how=restart
    # It has started when the server says so.
    if act systemctl "$how" $name.service &&
        act curl --silent --show-error --fail --output /dev/null --max-time 60 $health; then
        [[ -z $must_restart ]] || remove_old_releases
        return
    fi
    [[ -n $previous ]] || fail "The server does not answer: journalctl --unit $name"
    point_to "$previous"
    systemctl restart $name.service
    fail "The new release does not answer: $previous is back. journalctl --unit $name"
}

# This one and the one before stay.
remove_old_releases() {
    local release
    for release in "$root$opt"/releases/*; do
        case releases/${release##*/} in
            "$(readlink "$root$opt/current")" | "$previous") ;;
            *) rm -rf "$release" ;;
        esac
    done
}

make_proxy() {
    install --directory --mode=0755 "$root$acme"
    install --directory --mode=0700 "$root$etc/tls"
    make_certificate
    local ours=$root$etc/nginx.conf.installed fresh
    fresh=$(mktemp)
    sed "s/api\.example\.org/$domain/g" deploy/nginx.conf >"$fresh"
    if [[ ! -f $ours && -f $root$nginx ]]; then
        cp "$root$nginx" "$root$nginx.before"
    fi
    if [[ ! -f $ours ]] || cmp --quiet "$ours" "$root$nginx"; then
        put "$fresh" $nginx 0644
        cmp --quiet "$fresh" "$ours" || cp "$fresh" "$ours"
    elif ! cmp --quiet "$fresh" "$ours"; then
        say "$nginx was edited and stays; the new one is $nginx.new"
        put "$fresh" $nginx.new 0644
    fi
    rm -f "$fresh"
    act nginx -t -q
    act systemctl enable --quiet --now nginx
    act systemctl reload nginx
}

# A certificate that nobody trusts, until certbot has made a real one.
make_certificate() {
    local tls=$etc/tls live=/etc/letsencrypt/live/$domain file
    if [[ -e $root$live/fullchain.pem ]]; then
        for file in fullchain.pem privkey.pem; do
            ln --symbolic --force "$live/$file" "$root$tls/$file"
        done
    elif [[ ! -e $root$tls/fullchain.pem ]]; then
        act openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 90 \
            -subj "/CN=$domain" -keyout $tls/privkey.pem -out $tls/fullchain.pem
    fi
}

main "$@"
