//! The one error type of the core.
//!
//! A message says what is wrong, where (file, tensor), and, where there is one, what to do.
//! The variants are the classes that a caller can tell apart; the bindings map each to one
//! Python exception.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function of the core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused: no such file, no permission, no space.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory that was asked for.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A base checkpoint that is broken or not of a kind that can be read.
    #[error("{}: {}", path.display(), shortened(message))]
    Checkpoint {
        /// The file or directory at fault.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// An adapter that is broken: its config, its file, or the two together.
    #[error("{}: {}", path.display(), shortened(message))]
    Adapter {
        /// The file or directory at fault.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// An adapter that is sound but uses something that cannot be merged.
    #[error("{}: {}", path.display(), shortened(message))]
    Unsupported {
        /// The adapter.
        path: PathBuf,
        /// The feature by its name, and what to do.
        message: String,
    },
    /// Adapters and base do not fit together. Every problem that was found is listed.
    #[error("{}", list_problems(.0))]
    Plan(Vec<String>),
    /// The output cannot be written where it was asked for.
    #[error("{}: {}", path.display(), shortened(message))]
    Output {
        /// The output directory, or the file in it.
        path: PathBuf,
        /// What stands in the way and what to do.
        message: String,
    },
    /// A store that is no directory refused, or could not be reached.
    #[error("{}: {}", path.display(), shortened(message))]
    Store {
        /// The object, or the store.
        path: PathBuf,
        /// What happened and what to do.
        message: String,
    },
    /// The arithmetic left the range of the output's dtype.
    #[error("tensor {}: {}", shortened(tensor), shortened(message))]
    Numeric {
        /// The base tensor's name.
        tensor: String,
        /// What happened, and where in the tensor.
        message: String,
    },
    /// An argument outside its domain.
    #[error("{}", shortened(.0))]
    Argument(String),
    /// What a caller's own function raised, to be handed back to the caller as it is.
    #[error("{0}")]
    Foreign(Box<dyn std::error::Error + Send + Sync>),
    /// The caller raised the cancel flag.
    #[error("cancelled")]
    Cancelled,
}

/// Whose file is read, which decides the class of what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A model's: [`Error::Checkpoint`].
    Checkpoint,
    /// An adapter's: [`Error::Adapter`].
    Adapter,
}

impl Owner {
    /// The error for a file that is not what it should be.
    pub fn broken(self, path: impl AsRef<Path>, message: impl Into<String>) -> Error {
        match self {
            Self::Checkpoint => Error::checkpoint(path, message),
            Self::Adapter => Error::adapter(path, message),
        }
    }

    /// The error for a file that somebody truncated, replaced or wrote to while it was read.
    pub fn changed(self, path: impl AsRef<Path>) -> Error {
        self.broken(path, "changed while it was read; run again when it is complete")
    }

    /// The error for a read that failed: a file that ends before its end has changed.
    pub fn unread(self, path: impl AsRef<Path>, error: io::Error) -> Error {
        // What reads for the core may have failed in words of its own.
        match error.downcast::<Error>() {
            Ok(own) => own,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.changed(path),
            Err(error) => Error::io(path, error),
        }
    }
}

impl Error {
    /// What is wrong with a model's file, said of an adapter's where it is one.
    #[must_use]
    pub fn of(self, owner: Owner) -> Self {
        match (self, owner) {
            (Self::Checkpoint { path, message }, Owner::Adapter) => Self::Adapter { path, message },
            (other, _) => other,
        }
    }

    /// An [`Error::Io`] about `path`; what is an error of this type on its way through the system's is
    /// that error.
    pub fn io(path: impl AsRef<Path>, source: io::Error) -> Self {
        match source.downcast::<Self>() {
            Ok(own) => own,
            Err(source) => Self::Io { path: path.as_ref().to_path_buf(), source },
        }
    }

    /// An [`Error::Store`] about the object `path`.
    pub fn store(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Store { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// An [`Error::Checkpoint`] about `path`.
    pub fn checkpoint(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// An [`Error::Adapter`] about `path`.
    pub fn adapter(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Adapter { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// An [`Error::Unsupported`] about `path`.
    pub fn unsupported(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Unsupported { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// An [`Error::Output`] about `path`.
    pub fn output(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Output { path: path.as_ref().to_path_buf(), message: message.into() }
    }
}

/// Characters without white space that a message spells out.
const LONGEST_WORD: usize = 300;
/// Characters that are left of a longer word, at its beginning and at its end.
const ENDS_OF_WORD: usize = 100;
/// Characters that a message spells out.
const LONGEST_MESSAGE: usize = 20_000;
/// Characters that are left of a longer message, at its beginning and at its end.
const ENDS_OF_MESSAGE: usize = 5_000;

/// A message that quotes strangers' names, in a length that somebody can read: a word of more than
/// 300 characters keeps its beginning and its end, and so does the whole message.
pub fn shortened(message: &str) -> Cow<'_, str> {
    let is_long = |word: &str| word.len() > LONGEST_WORD && word.chars().count() > LONGEST_WORD;
    if message.len() <= LONGEST_WORD {
        return message.into();
    }
    let words = || message.split_inclusive(char::is_whitespace);
    let mut text = Cow::Borrowed(message);
    if words().any(|word| is_long(word.trim_end())) {
        let short = words().map(|word| {
            let bare = word.trim_end();
            if is_long(bare) {
                cut(bare, ENDS_OF_WORD) + &word[bare.len()..]
            } else {
                word.to_owned()
            }
        });
        text = Cow::Owned(short.collect());
    }
    if text.len() > LONGEST_MESSAGE && text.chars().count() > LONGEST_MESSAGE {
        text = Cow::Owned(cut(&text, ENDS_OF_MESSAGE));
    }
    text
}

/// Shortens every one of some messages.
pub fn shorten_all<'a>(messages: impl Iterator<Item = &'a mut String>) {
    for message in messages {
        if let Cow::Owned(short) = shortened(message) {
            *message = short;
        }
    }
}

/// The first and the last characters of a text, and how many it has.
fn cut(text: &str, kept: usize) -> String {
    let begin = text.char_indices().nth(kept).map_or(text.len(), |(position, _)| position);
    let end = text.char_indices().rev().nth(kept - 1).map_or(0, |(position, _)| position);
    let count = text.chars().count();
    format!("{}…{} ({count} characters)", &text[..begin], &text[end..])
}

/// A number with its noun: `1 module`, `2 modules`.
#[must_use]
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// The form of a verb that goes with a number: `agree(count, "has", "have")`.
#[must_use]
pub fn agree<'a>(count: usize, one: &'a str, several: &'a str) -> &'a str {
    if count == 1 { one } else { several }
}

/// A word with its article: `a LOKR`, `an IA3`.
#[must_use]
pub fn with_article(word: &str) -> String {
    let letters: String = word.chars().take_while(char::is_ascii_alphabetic).collect();
    // The letters of short abbreviations are named one by one: "aitch", "ex".
    let is_spelled = letters.len() <= 3
        && !letters.is_empty()
        && letters.chars().all(|letter| letter.is_ascii_uppercase());
    // So is an X before a consonant.
    let is_x =
        matches!(letters.as_bytes(), [b'X' | b'x', next, ..] if !b"AEIOUYaeiouy".contains(next));
    let vowels = if is_spelled { "AEFHILMNORSX" } else { "AEIOaeio" };
    let begins_with_vowel = word.chars().next().is_some_and(|first| vowels.contains(first));
    format!("{} {word}", if begins_with_vowel || is_x { "an" } else { "a" })
}

/// The most problems that one message spells out; the error itself carries all of them.
const PROBLEMS_IN_MESSAGE: usize = 8;

fn list_problems(problems: &[String]) -> String {
    match problems {
        [only] => shortened(only).into_owned(),
        _ => {
            let mut text = counted(problems.len(), "problem");
            for problem in problems.iter().take(PROBLEMS_IN_MESSAGE) {
                text.push_str("\n  - ");
                text.push_str(&shortened(problem));
            }
            if problems.len() > PROBLEMS_IN_MESSAGE {
                let rest = problems.len() - PROBLEMS_IN_MESSAGE;
                text.push_str(&format!("\n  - and {rest} more"));
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_problem_is_the_message() {
        assert_eq!(Error::Plan(vec!["x does not fit".into()]).to_string(), "x does not fit");
    }

    #[test]
    fn a_name_of_a_megabyte_makes_no_message_of_a_megabyte() {
        let name = "ü".repeat(500_000) + ".weight";
        let message = Error::Plan(vec![format!("its module {name} fits nothing")]).to_string();
        assert!(message.starts_with("its module üü") && message.ends_with(") fits nothing"));
        assert!(message.contains("….weight") || message.contains("üü.weight (500007 characters)"));
        assert!(message.chars().count() < 300, "{message}");
        let apart = "a ".repeat(500_000);
        let message = Error::adapter("x", format!("has {apart}")).to_string();
        assert!(message.starts_with("x: has a a") && message.contains("(1000004 characters)"));
        assert!(message.len() < 11_000);
        let plain = format!("{} is a name", "a".repeat(300));
        assert_eq!(shortened(&plain), plain);
    }

    #[test]
    fn many_problems_are_listed_and_the_rest_counted() {
        let message = Error::Plan((0..10).map(|i| format!("p{i}")).collect()).to_string();
        assert!(message.starts_with("10 problems\n  - p0\n"));
        assert!(message.ends_with("- p7\n  - and 2 more"));
    }

    #[test]
    fn numbers_verbs_and_articles_agree() {
        assert_eq!([1, 2].map(|count| counted(count, "module")), ["1 module", "2 modules"]);
        assert_eq!([0, 1, 2].map(|count| agree(count, "is", "are")), ["are", "is", "are"]);
        for word in ["IA3", "ADALORA", "OFT", "LN_TUNING", "HRA", "XLORA", "adapter"] {
            assert_eq!(with_article(word), format!("an {word}"));
        }
        for word in ["LOKR", "VERA", "BOFT", "C3A", "FOURIERFT", "P_TUNING", "module", ""] {
            assert_eq!(with_article(word), format!("a {word}"));
        }
    }
}
