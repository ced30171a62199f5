"""What is taken out of statements and values, and what stays."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_agent.protocols.postgres import redact
from pam_agent.protocols.postgres.redact import (
    TAIL,
    CopyRedaction,
    is_sensitive,
    is_suspect,
    redact_copy,
    redact_message,
    redact_sql,
    redact_value,
)

SECRET = "hunter2"


@pytest.mark.parametrize(
    "sql",
    [
        "ALTER ROLE bob PASSWORD 'hunter2'",
        "alter role bob encrypted password 'hunter2' valid until '2030-01-01'",
        "CREATE USER bob WITH LOGIN PASSWORD E'hunter2'",
        "CREATE ROLE bob PASSWORD E'it\\'s hunter2'",
        "CREATE ROLE bob PASSWORD 'it''s hunter2'",
        "CREATE ROLE bob PASSWORD U&'hunter2'",
        "CREATE ROLE bob PASSWORD $$hunter2$$",
        "CREATE ROLE bob PASSWORD $tag$it's hunter2$tag$",
        "CREATE ROLE bob PASSWORD /* x */ 'hunter2'",
        "CREATE ROLE bob PASSWORD -- x\n 'hunter2'",
        "CREATE ROLE bob PASSWORD /* /* nested ' */ ' */ 'hunter2'",
        "CREATE ROLE bob PASSWORD 'hunter2",
        "CREATE ROLE bob PASSWORD $$hunter2",
        "CREATE ROLE bob PASSWORD hunter2",
        'CREATE ROLE bob PASSWORD "hunter2"',
        "CREATE ROLE bob PASSWORD 'a'\n  'hunter2'",
        "CREATE USER MAPPING FOR bob SERVER s OPTIONS (user 'x', password 'hunter2')",
        "ALTER USER MAPPING FOR bob SERVER s OPTIONS (SET \"password\" 'hunter2')",
        "CREATE SUBSCRIPTION s CONNECTION 'host=h password=hunter2 dbname=d' PUBLICATION p",
        "ALTER SUBSCRIPTION s CONNECTION 'host=h password=''hunter2 x'' dbname=d'",
        "ALTER SUBSCRIPTION s CONNECTION 'postgresql://bob:hunter2@h/d'",
        "SELECT dblink_connect('host=h user=u password=hunter2')",
        "SELECT dblink('postgres://u:hunter2@h/d', 'select 1')",
        "select * from dblink(E'password=\\'hunter2\\' host=h', 'select 1') t(i int)",
        "DO $$ BEGIN EXECUTE 'ALTER ROLE bob PASSWORD ''hunter2'''; END $$",
        "DO $$ BEGIN ALTER ROLE bob PASSWORD 'hunter2'; END $$",
        "DO 'BEGIN ALTER ROLE bob PASSWORD ''hunter2''; END'",
        "SET app.api_password = 'hunter2'",
        "SET app.password TO hunter2",
        "UPDATE t SET secret = 'hunter2'",
        "INSERT INTO users(name, password) VALUES ('bob', 'hunter2')",
        "SELECT crypt('hunter2', gen_salt('bf'))",
        "SELECT pgp_sym_decrypt(x, 'hunter2') FROM t",
        "/* ALTER ROLE bob PASSWORD 'hunter2' */ select 1",
        "-- ALTER ROLE bob PASSWORD 'hunter2'\nselect 1",
        "select 1; ALTER ROLE bob PASSWORD 'hunter2'",
        "COPY t FROM PROGRAM 'curl https://u:hunter2@h/'",
        """SELECT '{"user": "x", "password": "hunter2"}'::jsonb""",
        "select 'SCRAM-SHA-256$4096:hunter2==$abc:def'",
    ],
)
def test_postgres_redact_hides(sql):
    clean = redact_sql(sql)
    assert SECRET not in clean
    assert "***" in clean


@pytest.mark.parametrize(
    ("sql", "clean"),
    [
        ("ALTER ROLE bob PASSWORD 'x' LOGIN", "ALTER ROLE bob PASSWORD '***' LOGIN"),
        ("ALTER ROLE bob PASSWORD NULL", "ALTER ROLE bob PASSWORD NULL"),
        ("CREATE ROLE b PASSWORD $a$x$a$;", "CREATE ROLE b PASSWORD $a$***$a$;"),
        ("select 'a' as password, 'b'", "select 'a' as password, '***'"),
        (
            "select dblink('host=h password=p dbname=d', 'select ''x''')",
            "select dblink('host=h password=*** dbname=d', 'select ''x''')",
        ),
        (
            "DO $$ BEGIN PERFORM 'x'; ALTER ROLE b PASSWORD 'p'; END $$",
            "DO $$ BEGIN PERFORM 'x'; ALTER ROLE b PASSWORD '***'; END $$",
        ),
        ("create table t (password text, x int)", "create table t (password text, x int)"),
        ("select 'https://example.com/a:b@c'", "select 'https://example.com/a:b@c'"),
    ],
)
def test_postgres_redact_keeps_the_shape(sql, clean):
    assert redact_sql(sql) == clean


def test_postgres_redact_where_backslashes_escape():
    sql = r"ALTER ROLE b PASSWORD 'it\'s; hunter2'; select 1"
    assert SECRET not in redact_sql(sql, backslashes=True)
    assert redact_sql(sql, backslashes=True).endswith("; select 1")


@given(st.text())
def test_postgres_redact_leaves_harmless_text(text):
    if not is_sensitive(text) and not any(word in text.lower() for word in ("token", "://", "scram", "md5")):
        assert redact_sql(text) == text
        assert redact_value(text) == text


@given(
    st.lists(
        st.sampled_from(["'", "''", "\\", "$$", "$a$", '"', "--", "/*", "*/", "\n", ";", "e'", "x", " "])
    )
)
def test_postgres_redact_after_a_mention_never_raises(parts):
    sql = "alter role x password " + "".join(parts)
    for backslashes in (False, True):
        assert isinstance(redact_sql(sql, backslashes=backslashes), str)


@given(st.text(alphabet="abc' \n$", max_size=30))
def test_postgres_redact_any_quoted_password(password):
    literal = "'" + (password + "QQQQ").replace("'", "''") + "'"
    assert "QQQQ" not in redact_sql(f"ALTER ROLE bob PASSWORD {literal}; select 1")


def test_postgres_redact_a_backslash_hides_nothing():
    assert redact_value("password='a\\\nhunter2' user=u") == "password=*** user=u"
    # Cut in the middle of an escape.
    assert SECRET not in redact_sql("insert into t(password) values ('hunter2\\", backslashes=True)
    assert SECRET not in redact_value('password="hunter2\\')


def test_postgres_redact_takes_linear_time():
    parts = ("'", "''", "$$", "/*", "password=", "x' ", "://a:", "$a$ ", 'password="', "E'\\")
    # Long words, such as base64 in a column, beside a word that makes a text suspect.
    for part in (*parts, "a", "passw", "a_token", "://a:b@", '"pwd="', "secret ="):
        sql = "password " + part * (200_000 // len(part))
        start = time.thread_time()
        redact_sql(sql)
        redact_value(sql)
        redact_message(sql, sensitive=True)
        redact_copy(sql)
        redact_copy(sql.replace(" ", "\t\\"))
        assert time.thread_time() - start < 3, part


def test_postgres_redact_values_and_messages():
    assert redact_value("host=h password='a b' user=u") == "host=h password=*** user=u"
    assert redact_value("postgres://u:p@h/d") == "postgres://u:***@h/d"
    assert redact_value("md5" + "0" * 32) == "***"
    assert redact_message('syntax error at or near "hunter2"', sensitive=True).count("hunter2") == 0
    assert redact_message('relation "t" does not exist', sensitive=False) == 'relation "t" does not exist'


@pytest.mark.parametrize("word", [*redact._SUSPECTS, *redact._MENTIONS])
def test_postgres_redact_looks_for_every_word(word):
    """The short cut for texts that hold none of them knows each."""
    assert is_suspect(f"a {word.upper()} b")
    assert is_sensitive(word) == (word in redact._MENTIONS)


@given(st.text(st.sampled_from("0123456789")))
def test_postgres_redact_leaves_numbers_alone(text):
    assert redact_value(text) == text


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        ("1\tpassword=hunter2\tx\n", "1\tpassword=***\tx\n"),
        (
            "password is\thunter2\n",
            "password is\thunter2\n",
        ),  # as in a row: one field says nothing of another
        ('1\t{"password": "hunter2"}\n', '1\t{"password": ***}\n'),
        ('1,"{""password"": ""hunter2""}"\n', '1,"{"password": ***}"\n'),  # CSV
        ('1,"password=""hunter2 hunter2"""\n', '1,"password=***"\n'),
        # Where the secret ends depends on what a backslash means.
        ('1\t{"password": "x\\\\"hunter2"}\t2\n', "1\t***\t2\n"),
        ('1,"{""password"": ""x\\""hunter2""}"\n', "***\n"),
        ("1\tpassword=\\thunter2\t2\n", "1\t***\t2\n"),
        ("1\ta\\tsecret\t2\n", "1\ta\\tsecret\t2\n"),
        ("\\N\t\\N\n", "\\N\t\\N\n"),
        ("", ""),
    ],
)
def test_postgres_redact_copy_data(line, clean):
    assert redact_copy(line) == clean
    assert CopyRedaction().next(line) == clean


@given(st.integers(0, 60), st.integers(0, 60))
def test_postgres_redact_a_secret_across_pieces_of_a_copy(one, two):
    """What was in the piece before cannot be taken back; the rest of the field is hidden."""
    whole = "1\thost=h password=" + "Q" * 20 + "\tx\n2\tplain\n"
    first, second = sorted((one, two))
    copy = CopyRedaction()
    parts = [whole[:first], whole[first:second], whole[second:]]
    told = [copy.next(part) for part in parts]
    start = whole.index("Q")
    for part, clean, end in zip(parts, told, (first, second, len(whole)), strict=True):
        if end - len(part) > start or end > start + 20:
            assert "Q" not in clean
    assert "".join(told).endswith("\n2\tplain\n") or second > whole.index("\n2")


def test_postgres_redact_of_an_unfinished_field_the_end_is_looked_at_again():
    for more, hidden in ((TAIL - len("password="), True), (TAIL - len("password=") + 1, False)):
        copy = CopyRedaction()
        copy.next("password=" + " " * more)
        assert (copy.next("hunter2\n") == "***\n") is hidden


@given(st.lists(st.text(st.sampled_from("ab\t\n\\\"' ,"))))
def test_postgres_redact_leaves_harmless_copy_data(pieces):
    copy = CopyRedaction()
    assert [copy.next(piece) for piece in pieces] == pieces
