-- The tables of the service. PostgreSQL owns authorization, status and audit;
-- Keycloak owns identity and passwords. No password, token or code is stored
-- here: only hashes, and answers sealed with what is not stored.
--
-- The file is applied as a whole, in one transaction, when its version is greater than the
-- one in schema_version: schemaVersion in store.go. An older instance beside a newer one
-- therefore changes nothing. Every statement may be repeated.

-- One row: the version of the schema that this database has.
create table if not exists schema_version (
    only_row   boolean primary key default true check (only_row),
    version    integer not null,
    applied_at timestamptz not null
);

-- Everyone who may have an account: a row is written right after Keycloak has
-- accepted the user (is_verified = false) and removed again if the registration
-- expires or is cancelled. Later it is marked as deleted, or erased: then nothing is left but its ids, and the
-- row goes when Keycloak's user is deleted.
create table if not exists users (
    user_id       varchar(32) primary key,             -- USR-… , also a claim in every token
    keycloak_id   varchar(255) unique not null,        -- the token's sub
    email         varchar(255) not null,               -- its domain as an A-label; compared without case; '' = being erased
    username      varchar(100) not null,               -- compared without case
    first_name    varchar(100),
    last_name     varchar(100),
    phone         varchar(20),                         -- E.164
    photo         text,
    is_verified   boolean not null default false,      -- the e-mail address was confirmed
    role          varchar(50) not null default 'user',
    network_id    varchar(32) not null default '',     -- '' = no network; "X" in tokens
    station_id    varchar(32) not null default '',
    source        varchar(20) not null default 'web',
    is_active     boolean not null default true,
    deleted_at    timestamptz,
    last_login_at timestamptz,
    created_at    timestamptz not null default now(),
    updated_at    timestamptz not null default now(),
    created_by    varchar(32),                         -- user id of an administrator; null = themselves
    updated_by    varchar(32),
    not_before    timestamptz,                         -- sessions begun before are still to be ended in Keycloak; null = none
    kept_session  varchar(64) not null default '',     -- of Keycloak: the one of these that stays; '' = none
    constraint valid_role check (role in ('user', 'admin', 'partner', 'operator')),
    constraint valid_source check (source in ('web', 'internal')),
    constraint check_deleted check (
        (deleted_at is null and is_active = true) or
        (deleted_at is not null and is_active = false)
    )
);
alter table users add column if not exists kept_session varchar(64) not null default ''; -- version 3 had none
create unique index if not exists one_live_user_per_email on users (lower(email)) where deleted_at is null;
create unique index if not exists one_live_user_per_username on users (lower(username)) where deleted_at is null;

-- Lists run from the latest to the earliest. Each scope has its index: everybody, a network,
-- a station of a network.
create index if not exists users_by_time on users (created_at, user_id);
create index if not exists users_in_network on users (network_id, created_at, user_id);
create index if not exists users_in_station on users (network_id, station_id, created_at, user_id);
-- The search for a text works without its index, it only reads more. So it does where
-- PostgreSQL does not have the extension or does not let this role create or use it.
do $$ declare
    trgm text; -- its schema, which need not be in the search_path
begin
    create extension if not exists pg_trgm;
    select nspname into trgm from pg_extension join pg_namespace n on n.oid = extnamespace where extname = 'pg_trgm';
    execute format($index$create index if not exists users_by_text on users using gin (lower(email || ' ' || username
        || ' ' || coalesce(first_name, '') || ' ' || coalesce(last_name, '')) %I.gin_trgm_ops)$index$, trgm);
    alter index users_by_text set (gin_pending_list_limit = 64); -- kB of what is not sorted in yet: each search reads all of it
exception when others then -- each provider refuses an extension in its own way
    raise warning 'the search for users works without its index: %. As a superuser: create extension pg_trgm. '
        'Then: auth-service migrate', sqlerrm;
end $$;

-- One person's attempt to open an account. It only moves forward:
-- pending → verified | expired | cancelled.
create table if not exists user_registrations (
    registration_id    varchar(32) primary key,        -- REG-…; whoever knows it may ask for the status
    email              varchar(255) not null,
    username           varchar(100) not null,
    first_name         varchar(100),
    last_name          varchar(100),
    phone              varchar(20),
    verification_token varchar(100) unique not null,   -- SHA-256 of the link's token, hex
    verification_code  varchar(10),                    -- keyed hash of the six digits, see codeHash
    status             varchar(20) not null default 'pending',
    keycloak_id        varchar(255),                   -- null: Keycloak has not accepted the user, or has deleted it
    user_id            varchar(32),
    resend_count       integer not null default 0,
    expires_at         timestamptz not null,           -- meaningful only while pending
    verified_at        timestamptz,
    created_at         timestamptz not null default now(),
    ip_address         varchar(50),
    user_agent         text,
    -- beyond the given columns:
    locale             varchar(20) not null default '',    -- language of the mails, BCP 47
    mail_state         varchar(10) not null default 'queued',
    mailed_at          timestamptz,                        -- when Keycloak took the last mail
    mail_refused_at    timestamptz,                        -- since when Keycloak's mail server refuses it; null = it does not
    ended_at           timestamptz,                        -- expired or cancelled: personal data are gone
    source             varchar(20) not null default 'web', -- internal: an invitation
    role               varchar(50) not null default 'user',
    network_id         varchar(32) not null default '',
    station_id         varchar(32) not null default '',
    created_by         varchar(32),                        -- who has invited
    constraint valid_registration_status check (status in ('pending', 'verified', 'expired', 'cancelled')),
    constraint valid_mail_state check (mail_state in ('sent', 'queued', 'failed')),
    constraint fk_user_id foreign key (user_id) references users (user_id)
);
create unique index if not exists one_pending_registration_per_email
    on user_registrations (lower(email)) where status = 'pending';
create index if not exists registrations_by_email on user_registrations (lower(email), created_at);
create index if not exists registrations_by_mail on user_registrations (mailed_at) where mailed_at is not null;
create index if not exists registrations_ended on user_registrations (ended_at) where ended_at is not null;
create index if not exists registrations_by_user on user_registrations (user_id) where user_id is not null;

-- A sign-in. Ended sessions stay for 30 days; ended_reason says why.
create table if not exists sessions (
    session_id          varchar(32) primary key,       -- SES-…
    user_id             varchar(32) not null references users (user_id),
    keycloak_session_id varchar(255) not null,         -- claim sid
    ip_address          varchar(50) not null,          -- of the sign-in
    user_agent          text not null,
    created_at          timestamptz not null,
    last_used_at        timestamptz not null,          -- sign-in or latest refresh
    expires_at          timestamptz not null,          -- when Keycloak lets the refresh token die
    origin              varchar(10) not null default 'service', -- keycloak: begun there, and found when sessions were listed
    ended_at            timestamptz,
    ended_reason        varchar(40)
);
create index if not exists sessions_of_user on sessions (user_id, (ended_at is null), created_at, session_id); -- live ones apart
create index if not exists sessions_by_keycloak on sessions (keycloak_session_id);
create index if not exists sessions_by_end on sessions (expires_at);

-- The refresh tokens of live sessions, used ones too. Whoever shows one that was used is given the same answer within
-- its grace time, and an answer as long as the next token was never used; else it is theft.
create table if not exists refresh_tokens (
    token_hash   varchar(64) primary key,              -- SHA-256 of the token, hex
    session_id   varchar(32) not null references sessions (session_id),
    used_at      timestamptz,                          -- null = not yet
    answer       bytea,                                -- of the exchange, sealed with a key made of the token; null = none, or it is over
    answer_until timestamptz                           -- the end of the next token, or when that was used, of the grace time
);
alter table refresh_tokens add column if not exists answer_until timestamptz; -- version 1 had none
create index if not exists refresh_tokens_by_session on refresh_tokens (session_id);
create index if not exists refresh_tokens_by_answer on refresh_tokens (answer_until) where answer is not null;

-- Access tokens that count no more although they have not expired: of a session that has
-- ended, of a user whose role or scope is another now, or issued before the user's sessions
-- were ended. Kept for as long as a token
-- may live.
create table if not exists revocations (
    revocation_id       bigint generated always as identity primary key,
    at                  timestamptz not null default clock_timestamp(),
    keycloak_session_id varchar(255) not null,         -- claim sid; '' = of a user
    user_id             varchar(32) not null,
    role                varchar(50) not null,          -- what is true of the user now
    network_id          varchar(32) not null,
    station_id          varchar(32) not null,
    is_active           boolean not null,
    not_before          timestamptz                    -- not null: only tokens of the user that were issued before
);
create index if not exists revocations_by_time on revocations (at);

-- What happened, who did it, to whom, from where. An entry is written in the transaction of
-- its change. Append-only: the triggers below refuse the rest, and the
-- service's role has no right to it. One partition a month, so that a month is dropped
-- as a whole when its time is over.
create table if not exists audit_log (
    audit_id   varchar(32) not null,                   -- AUD-…
    at         timestamptz not null,
    actor      varchar(100) not null,                  -- USR-…, anonymous, system:…, cli:…
    action     varchar(50) not null,                   -- registration.verified, login, …
    target     varchar(100) not null,                  -- the id of what was acted on, or ''
    outcome    varchar(10) not null,                   -- ok, refused, failed
    reason     varchar(100) not null default '',       -- a problem's slug or a short constant
    network_id varchar(32) not null default '',        -- of the target, if it is a user, else of the actor; its partners may read it
    ip_address varchar(50) not null default '',
    user_agent text not null default '',
    request_id varchar(64) not null default '',
    details    jsonb not null default '{}',
    primary key (audit_id, at),
    constraint valid_outcome check (outcome in ('ok', 'refused', 'failed'))
) partition by range (at);
create index if not exists audit_by_time on audit_log (at, audit_id);
create index if not exists audit_of_target on audit_log (target, at, audit_id);
create index if not exists audit_of_actor on audit_log (actor, at, audit_id);
create index if not exists audit_in_network on audit_log (network_id, at, audit_id);

create or replace function audit_log_is_append_only() returns trigger language plpgsql as $$
begin
    raise exception 'audit_log is append-only';
end $$;
create or replace trigger audit_log_keeps_rows before update or delete on audit_log
    for each row execute function audit_log_is_append_only(); -- of partitions, too
create or replace trigger audit_log_keeps_all before truncate on audit_log
    for each statement execute function audit_log_is_append_only();

-- audit_log_month makes the partition of a time's month (UTC) unless it is there. It has
-- the rights of the tables' owner. It waits for whoever reads the audit log for long (a dump),
-- and those who write wait for it: so it gives up after a second, and is tried again.
create or replace function audit_log_month(at timestamptz) returns void language plpgsql
    security definer set search_path from current set lock_timeout = '1s' as $$
declare
    month timestamp := date_trunc('month', at at time zone 'UTC');
    name  text := 'audit_log_' || to_char(month, 'YYYY_MM');
begin
    if to_regclass(name) is null then
        perform pg_advisory_xact_lock(7206);
        execute format('create table if not exists %I partition of audit_log for values from (%L) to (%L)',
            name, month at time zone 'UTC', (month + interval '1 month') at time zone 'UTC');
        execute format('create or replace trigger audit_log_keeps_all before truncate on %I
            for each statement execute function audit_log_is_append_only()', name);
    end if;
end $$;

-- Work that one instance at a time must do, now, later or again: see queue.go.
create table if not exists tasks (
    task_id      text primary key,                     -- what it is about, see queue.go
    due_at       timestamptz not null,                 -- when it must be done
    attempts     integer not null default 0,           -- that have failed since it was last done
    revision     integer not null default 0,           -- grows with each enqueue: work that was asked for meanwhile; 0: only a lock
    locked_by    varchar(32),                          -- who does it now
    locked_until timestamptz,                          -- when that lock ends by itself
    last_error   varchar(100) not null default ''      -- a word for the operator
);
create index if not exists tasks_by_due on tasks (coalesce(locked_until, due_at)); -- a lock that has ended by itself is due

-- How far Keycloak's events have been read. One row.
create table if not exists sync_cursor (
    only_row   boolean primary key default true check (only_row),
    admin_at   bigint not null,                        -- time of the latest admin event, milliseconds since 1970
    user_at    bigint not null,                        -- time of the latest user event
    event_ids  text[] not null                         -- of the latest ones, which are read again
);

-- Full passes over all users, and their reports.
create table if not exists sync_runs (
    sync_id     varchar(32) primary key,               -- SYN-…
    dry_run     boolean not null,
    status      varchar(10) not null,
    started_by  varchar(100) not null,                 -- the audit log's actor
    started_at  timestamptz not null,
    ended_at    timestamptz,
    checked     integer not null default 0,
    total       integer not null default 0,
    differences jsonb not null default '{}',
    detail      text not null default '',
    constraint valid_sync_status check (status in ('running', 'done', 'aborted', 'failed'))
);
create index if not exists sync_runs_by_time on sync_runs (started_at);
create unique index if not exists one_running_sync on sync_runs (status) where status = 'running';

-- Counters of every limit, exact over all instances: a window begins with the
-- first hit and ends at resets_at. Unlogged: after a crash of PostgreSQL the
-- counters begin anew, which harms nobody and spares the log.
create unlogged table if not exists rate_limits (
    key       varchar(120) primary key,                -- what is limited and a hash of whom
    hits      integer not null,
    resets_at timestamptz not null
);
create index if not exists rate_limits_by_end on rate_limits (resets_at);

-- The role that the service runs as in production, if there is one: it can do what the
-- service does, and neither change nor delete audit entries.
do $$ begin
    if exists (select from pg_roles where rolname = 'auth_service') then
        grant select on schema_version to auth_service;
        grant select, insert, update, delete on users, user_registrations, sessions, refresh_tokens, revocations,
            tasks, rate_limits, sync_cursor, sync_runs to auth_service;
        grant select, insert on audit_log to auth_service;
    end if;
end $$;
