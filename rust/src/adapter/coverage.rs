//! What becomes of each config field and each tensor of an adapter: used, not needed, or refused.

use serde::Serialize;

/// What becomes of a part of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It shapes the result.
    Used,
    /// The result is the same without it.
    NotNeeded,
    /// It cannot be merged.
    Refused,
}

/// One config field or tensor, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Account {
    /// The field's or tensor's name.
    pub name: String,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Why, in half a sentence.
    pub reason: String,
}

impl Account {
    /// One part's account.
    pub fn new(name: impl Into<String>, (verdict, reason): (Verdict, impl Into<String>)) -> Self {
        Self { name: name.into(), verdict, reason: reason.into() }
    }
}

/// The same with what is refused let pass where its name is among `allow`.
pub(super) fn allowed(accounts: &[Account], allow: &[String]) -> Vec<Account> {
    let passed = |account: &Account| match account.verdict {
        Verdict::Refused if allow.contains(&account.name) => {
            Account::new(account.name.as_str(), (Verdict::NotNeeded, "allowed by name"))
        }
        _ => account.clone(),
    };
    accounts.iter().map(passed).collect()
}

/// The reasons of all that is refused.
pub(super) fn refused(accounts: &[Account]) -> Vec<String> {
    let refused = accounts.iter().filter(|account| account.verdict == Verdict::Refused);
    refused.map(|account| account.reason.clone()).collect()
}

/// A whole adapter's account, in the order of its files.
#[derive(Debug, Clone, Serialize)]
pub struct Accounts {
    /// Every field of the config.
    pub fields: Vec<Account>,
    /// Every tensor.
    pub tensors: Vec<Account>,
}
