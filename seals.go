package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// The record is sealed in batches, each into a manifest that names the one before it. So
// whoever knows the hash of one seal, from the log for example, can prove that nothing up
// to it was altered, added or removed since.

const (
	sealBatch = 1000            // entries in a seal
	sealAfter = 2 * time.Minute // an entry's age: no transaction that may still write an earlier one takes as long
)

// auditSeal is a batch of entries, sealed. Its manifest is
//
//	seal 2 up to 1984 after 0f3c…        the seal before, "" in the first one
//	AUD-… 2026-01-31T12:00:00.123456Z 5e88…   digest, for each entry in order
type auditSeal struct {
	ID         int64
	LastNumber int64
	Hash       string // SHA-256 of the manifest, hex
	Manifest   string
}

// header is the first line of the manifest of a seal that follows another.
func (s auditSeal) header(before auditSeal) string {
	return fmt.Sprintf("seal %d up to %d after %s", s.ID, s.LastNumber, before.Hash)
}

// numbered is an entry with what a seal says of it.
type numbered struct {
	auditEntry
	Number int64
}

// line is the entry's line in a manifest.
func (e numbered) line() (string, error) {
	plain, err := json.Marshal(e.auditEntry)
	return fmt.Sprintf("%s %s %s", e.ID, e.At.Format(time.RFC3339Nano), digest(string(plain))), err
}

// sealAudit seals what is old enough. The log has each seal's hash, as a witness that is
// kept elsewhere.
func (s *server) sealAudit(ctx context.Context) error {
	for ctx.Err() == nil {
		made, entries, err := s.store.seal(ctx, s.now())
		if err != nil || entries == 0 {
			return err
		}
		s.log.InfoContext(ctx, "the record is sealed", "seal", made.ID, "entries", entries, "hash", made.Hash)
		if entries < sealBatch {
			return nil
		}
	}
	return nil
}

// seal makes the next seal, and says how many entries it has; without any it makes none.
// Instances that try at the same time do it once.
func (st *store) seal(ctx context.Context, now time.Time) (made auditSeal, entries int, err error) {
	err = st.tx(ctx, func(tx pgx.Tx) error {
		var mine bool
		if err := tx.QueryRow(ctx, `select pg_try_advisory_xact_lock(7205)`).Scan(&mine); err != nil || !mine {
			return err
		}
		before, err := one[auditSeal](ctx, tx, `select seal_id, last_number, hash, '' from audit_seals order by seal_id desc limit 1`)
		if err != nil && !errors.Is(err, errNotFound) {
			return err
		}
		batch, err := numberedEntries(ctx, tx, `number > $1 order by number limit $2`, before.LastNumber, sealBatch)
		if err != nil {
			return err
		}
		var lines []string
		for _, e := range batch {
			if e.At.After(now.Add(-sealAfter)) {
				break
			}
			line, err := e.line()
			if err != nil {
				return err
			}
			lines, made.LastNumber = append(lines, line), e.Number
		}
		if entries = len(lines); entries == 0 {
			return nil
		}
		made.ID = before.ID + 1
		made.Manifest = made.header(before) + "\n" + strings.Join(lines, "\n") + "\n"
		made.Hash = digest(made.Manifest)
		_, err = tx.Exec(ctx, `insert into audit_seals (seal_id, sealed_at, last_number, manifest, hash) values ($1, $2, $3, $4, $5)`,
			made.ID, now, made.LastNumber, made.Manifest, made.Hash)
		return err
	})
	return made, entries, err
}

func numberedEntries(ctx context.Context, q querier, where string, args ...any) ([]numbered, error) {
	rows, _ := q.Query(ctx, `select `+auditColumns+`, number from audit_log where `+where, args...)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[numbered])
	return list, storeError(err)
}

// misfit is what does not fit in the record: an entry or a seal.
type misfit struct{ what, how string }

func (m misfit) Error() string { return m.what + " " + m.how }

// verifyAudit checks every seal and every entry in one, and says what it has found. known
// is the hash of a seal from elsewhere, or "".
//
// It returns a misfit that names the first entry or seal that does not fit.
func (s *server) verifyAudit(ctx context.Context, known, operator string, out io.Writer) error {
	report, err := s.store.verifySeals(ctx, known)
	e := entry{Action: "audit.verify", Details: map[string]any{"entries": report.entries, "seals": report.last.ID}}
	if m := (misfit{}); errors.As(err, &m) {
		e.Outcome, e.Target, e.Reason = "failed", fmt.Sprintf("%.100s", m.what), "misfit"
	} else if err != nil {
		return err
	}
	if _, printErr := fmt.Fprint(out, report); printErr != nil {
		return printErr
	}
	return errors.Join(err, s.store.audit(ctx, caller{Actor: "cli:" + operator}, s.now(), e))
}

// sealReport is what verifySeals has seen.
type sealReport struct {
	entries, removed, unsealed int
	last                       auditSeal
	first                      time.Time // month that the record begins with
}

func (r sealReport) String() string {
	text := fmt.Sprintf("%d entries in %d seals fit; %d are not sealed yet.\n", r.entries, r.last.ID, r.unsealed)
	if r.removed > 0 {
		text += fmt.Sprintf("%d entries from before %s were removed with their month.\n", r.removed, r.first.Format("January 2006"))
	}
	if r.last.ID > 0 {
		text += fmt.Sprintf("The last seal is %s\n", r.last.Hash)
	}
	return text
}

func (st *store) verifySeals(ctx context.Context, known string) (r sealReport, err error) {
	var oldest string
	if err := st.pool.QueryRow(ctx, `select coalesce(min(relname), '') from pg_inherits join pg_class on pg_class.oid = inhrelid
		where inhparent = 'audit_log'::regclass`).Scan(&oldest); err != nil {
		return r, storeError(err)
	}
	if r.first, err = time.Parse("audit_log_2006_01", oldest); err != nil {
		return r, misfit{"partition " + oldest, "is not one of the record"}
	}
	r.last.LastNumber = math.MinInt64 // what stands before the first seal does not fit either
	for witnessed := known == ""; ; {
		next, err := one[auditSeal](ctx, st.pool, `select seal_id, last_number, hash, manifest from audit_seals where seal_id > $1 order by seal_id limit 1`, r.last.ID)
		if errors.Is(err, errNotFound) {
			if !witnessed {
				return r, misfit{"the seal " + known, "is not there: the record was rewritten, or it is another's"}
			}
			return r, storeError(st.pool.QueryRow(ctx, `select count(*) from audit_log where number > $1`, r.last.LastNumber).Scan(&r.unsealed))
		} else if err != nil {
			return r, err
		}
		if err := st.verifySeal(ctx, &r, next); err != nil {
			return r, err
		}
		r.last, witnessed = next, witnessed || next.Hash == known
	}
}

// verifySeal checks one seal against the one before it and against its entries.
func (st *store) verifySeal(ctx context.Context, r *sealReport, next auditSeal) error {
	lines := strings.Split(strings.TrimSuffix(next.Manifest, "\n"), "\n")
	if next.ID != r.last.ID+1 || next.Hash != digest(next.Manifest) || lines[0] != next.header(r.last) {
		return misfit{fmt.Sprintf("seal %d", next.ID), "was altered, or the one before it was"}
	}
	batch, err := numberedEntries(ctx, st.pool, `number > $1 and number <= $2 order by number`, r.last.LastNumber, next.LastNumber)
	if errors.As(err, new(pgx.ScanArgError)) {
		return misfit{fmt.Sprintf("seal %d", next.ID), "has an entry that can't be read any more"}
	} else if err != nil {
		return err
	}
	for _, line := range lines[1:] {
		id, at, _ := strings.Cut(line, " ")
		at, _, _ = strings.Cut(at, " ")
		switch written, err := time.Parse(time.RFC3339Nano, at); {
		case err != nil:
			return misfit{fmt.Sprintf("seal %d", next.ID), "has a line that is none of an entry"}
		case written.Before(r.first):
			r.removed++
			continue
		case len(batch) == 0:
			return misfit{id, "is missing"}
		}
		have, err := batch[0].line()
		switch {
		case err != nil:
			return err
		case string(batch[0].ID) != id && !strings.Contains(next.Manifest, string(batch[0].ID)):
			return misfit{string(batch[0].ID), "was added after its batch was sealed"}
		case string(batch[0].ID) != id:
			return misfit{id, "is missing"}
		case have != line:
			return misfit{id, "was altered"}
		}
		batch = batch[1:]
		r.entries++
	}
	if len(batch) > 0 {
		return misfit{string(batch[0].ID), "was added after its batch was sealed"}
	}
	return nil
}
