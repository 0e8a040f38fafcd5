//! Plain tables: no borders, upper-case headers, two spaces between columns, nothing wrapped.

use comfy_table::{ContentArrangement, Table, presets};
use owo_colors::OwoColorize as _;

use super::text::printable;

/// Rows under `headers`. Without rows only the headers, so that scripts find them always.
#[must_use]
pub fn rows<const N: usize>(headers: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = bare();
    table.set_header(headers);
    for row in rows {
        table.add_row(row.map(|cell| printable(&cell).into_owned()));
    }
    let text = finish(&mut table);
    match text.split_once('\n') {
        Some((header, body)) => format!("{}\n{body}", header.bold()),
        None => text.bold().to_string(),
    }
}

/// `key  value` lines.
#[must_use]
pub fn pairs(pairs: impl IntoIterator<Item = (String, String)>) -> String {
    let mut table = bare();
    for (key, value) in pairs {
        table.add_row([printable(&key).into_owned(), printable(&value).into_owned()]);
    }
    finish(&mut table)
}

fn bare() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn finish(table: &mut Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::text::without_ansi;

    #[test]
    fn columns_line_up() {
        let text =
            rows(["NAME", "AGE"], [["web".to_owned(), "3m".to_owned()], ["a-longer-name".to_owned(), "2d".to_owned()]]);
        insta::assert_snapshot!(without_ansi(&text), @r"
        NAME           AGE
        web            3m
        a-longer-name  2d
        ");
        assert_eq!(without_ansi(&rows(["NAME", "AGE"], [])), "NAME  AGE");
    }
}
