//! Which columns of a file of examples are read.

use super::table::{Column, Columns, Format};

/// Where the texts and labels are in a file.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Columns")]
pub(crate) struct ColumnArgs {
    /// The column or field of the text: a name, or a number from 1. Usual names (sentence, text,
    /// sentence1 with sentence2, …) are found by themselves.
    #[arg(long, value_name = "COLUMN")]
    text: Option<Column>,
    /// The column of the second text of a pair.
    #[arg(long, value_name = "COLUMN")]
    pair: Option<Column>,
    /// The column of the label.
    #[arg(long, value_name = "COLUMN")]
    label: Option<Column>,
    /// The first row names the columns. Guessed unless said.
    #[arg(long, conflicts_with = "no_header")]
    header: bool,
    /// The first row is an example.
    #[arg(long)]
    no_header: bool,
    /// How the file is written; its extension says it unless this does.
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

impl ColumnArgs {
    /// The same for the reader.
    pub(crate) fn columns(&self) -> Columns {
        Columns {
            text: self.text.clone(),
            pair: self.pair.clone(),
            label: self.label.clone(),
            header: (self.header || self.no_header).then_some(self.header),
            format: self.format,
        }
    }
}
