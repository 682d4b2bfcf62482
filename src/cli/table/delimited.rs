//! TSV and CSV.

use std::io::Read;
use std::path::Path;

use csv::StringRecord;
use randlora::Result;

use super::{
    Column, Columns, Example, Input, LABELS, Label, Labels, PAIRS, TEXTS, list, usual_label, usual_text,
    usual_texts, wrong, wrong_at,
};

/// A row and the line it begins on.
type Row = (usize, StringRecord);

/// Reads a file that is not blank.
pub(super) fn read(
    path: &Path,
    text: &str,
    delimiter: u8,
    columns: &Columns,
    labels: Labels,
) -> Result<Vec<Example>> {
    let rows = rows(path, text, delimiter)?;
    let Some((_, first)) = rows.first() else { return Err(wrong(path, "the file has no rows")) };
    let first: Vec<&str> = first.iter().collect();
    let header = has_header(columns, &first, &rows[1..]);
    let places = Places::find(path, columns, &first, header, labels)?;
    let rows = &rows[usize::from(header)..];
    if rows.is_empty() {
        return Err(wrong(path, "the file has a header and no rows: give one example in each"));
    }
    rows.iter().map(|row| places.example(path, row)).collect()
}

fn rows(path: &Path, text: &str, delimiter: u8) -> Result<Vec<Row>> {
    let quoting = delimiter == b',';
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(delimiter)
        .quoting(quoting)
        // With a line end after the last row, a quote that is still open there takes it in.
        .from_reader(text.as_bytes().chain(&b"\n"[..]));
    let mut rows = Vec::new();
    let (mut line, mut start) = (1, 0);
    for row in reader.records() {
        let row = row.map_err(|error| wrong(path, error.to_string()))?;
        // The position is that of the blank lines before the row, or of the line feed of a CRLF.
        let position = row.position().map_or(start, |p| p.byte() as usize);
        let from = text.len() - text[position..].trim_start_matches(['\r', '\n']).len();
        line += text[start..from].matches('\n').count();
        start = from;
        rows.push((line, row));
    }
    if let Some((line, row)) = rows.last().filter(|_| quoting) {
        let raw = text[start..].trim_end_matches(['\r', '\n']);
        let quotes = raw.len() - raw.trim_end_matches('"').len();
        if row.iter().next_back().is_some_and(|cell| cell.contains('\n')) && quotes.is_multiple_of(2) {
            return Err(wrong_at(path, *line, "a quote is opened in this row and never closed"));
        }
    }
    Ok(rows)
}

/// As the documentation of [`Columns::header`] says.
fn has_header(columns: &Columns, first: &[&str], others: &[Row]) -> bool {
    if let Some(header) = columns.header {
        return header;
    }
    let given: Vec<&Column> = [&columns.text, &columns.pair, &columns.label].into_iter().flatten().collect();
    if given.is_empty() {
        return first.iter().any(|cell| is_usual(cell));
    }
    given.iter().any(|column| match column {
        Column::Name(_) => true,
        Column::Number(number) => first.get(number.wrapping_sub(1)).is_some_and(|cell| is_usual(cell)),
    }) || is_above_numbers(columns, first, others)
}

fn is_usual(cell: &str) -> bool {
    let pairs = PAIRS.iter().flat_map(|(first, second)| [first, second]);
    TEXTS.iter().chain(LABELS).chain(pairs).any(|name| cell.trim().eq_ignore_ascii_case(name))
}

/// Whether the label's cell of the first row alone is no number.
fn is_above_numbers(columns: &Columns, first: &[&str], others: &[Row]) -> bool {
    let Some(Column::Number(number)) = columns.label else { return false };
    let is_number = |cell: Option<&str>| cell.is_some_and(|cell| cell.trim().parse::<f64>().is_ok());
    let at = number.wrapping_sub(1);
    !others.is_empty()
        && first.get(at).is_some_and(|cell| !is_number(Some(cell)))
        && others.iter().all(|(_, row)| is_number(row.get(at)))
}

/// Where the parts of an example are, counted from 0.
struct Places {
    text: usize,
    pair: Option<usize>,
    label: Option<usize>,
    /// The columns that the header names.
    width: Option<usize>,
}

impl Places {
    fn find(path: &Path, columns: &Columns, first: &[&str], header: bool, labels: Labels) -> Result<Places> {
        let names = if header { first } else { &[] };
        let give = |what: &str, option: &str| match header {
            true => {
                wrong(path, format!("no column is called {what}; give `{option}` one of: {}", list(names)))
            }
            false => {
                let count = first.len();
                wrong(
                    path,
                    format!(
                        "no header is found: give `--text` and `--label` as numbers of columns, 1 to {count}"
                    ),
                )
            }
        };
        let at = |column: &Column| place(path, column, first, header);
        let pair = columns.pair.as_ref().map(at).transpose()?;
        let (text, pair) = match &columns.text {
            Some(column) => (at(column)?, pair),
            None if pair.is_some() => (usual_text(names).ok_or_else(|| give("like a text", "--text"))?, pair),
            None => usual_texts(names).ok_or_else(|| give("like a text", "--text"))?,
        };
        let label = columns.label.as_ref().map(at).transpose()?.or_else(|| usual_label(names));
        if label.is_none() && labels == Labels::Needed {
            return Err(give("like a label", "--label"));
        }
        Ok(Places { text, pair, label, width: header.then_some(first.len()) })
    }

    fn example(&self, path: &Path, (line, row): &Row) -> Result<Example> {
        let has = row.len();
        let cell = |at: usize| {
            row.get(at).ok_or_else(|| {
                wrong_at(path, *line, format!("column {} is missing: the row has {has}", at + 1))
            })
        };
        if let Some(width) = self.width.filter(|&width| has > width) {
            let message = format!("{has} columns, but the header names {width}");
            return Err(wrong_at(path, *line, message));
        }
        let label = self.label.map(cell).transpose()?.map(str::trim);
        if label == Some("") {
            return Err(wrong_at(path, *line, "the label is empty"));
        }
        let second = self.pair.map(cell).transpose()?.map(str::to_string);
        let input = Input::Text { first: cell(self.text)?.to_string(), second };
        Ok(Example { line: *line, input, label: label.map(|label| Label::Text(label.to_string())) })
    }
}

fn place(path: &Path, column: &Column, first: &[&str], header: bool) -> Result<usize> {
    let name = match column {
        Column::Number(number) if (1..=first.len()).contains(number) => return Ok(number - 1),
        Column::Number(number) => {
            let message = format!("there is no column {number}: the first row has {}", first.len());
            return Err(wrong(path, message));
        }
        Column::Name(name) if !header => {
            let message = format!("column `{name}` cannot be found without a header: give its number");
            return Err(wrong(path, message));
        }
        Column::Name(name) => name,
    };
    let mut found = first.iter().enumerate().filter(|(_, cell)| cell.trim() == name).map(|(at, _)| at);
    match (found.next(), found.next()) {
        (Some(at), None) => Ok(at),
        (Some(_), Some(_)) => Err(wrong(path, format!("two columns are called `{name}`: give a number"))),
        (None, _) => {
            Err(wrong(path, format!("there is no column `{name}`; the first row has: {}", list(first))))
        }
    }
}
