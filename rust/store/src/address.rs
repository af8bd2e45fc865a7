//! Addresses: URLs of stores, taken apart, and written without what is secret in them.

use std::path::PathBuf;

use lorafast::{Error, Result};
use object_store::path::Path as ObjectPath;
use url::Url;

/// A kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// S3 and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure's blob storage.
    Azure,
    /// A web server that answers ranges; for reading alone, without listings.
    Http,
}

impl Kind {
    /// The kind of the URLs that begin so.
    fn of_scheme(scheme: &str) -> Option<Self> {
        match scheme {
            "s3" | "s3a" => Some(Self::S3),
            "gs" => Some(Self::Gcs),
            "az" | "azure" | "adl" | "abfs" | "abfss" => Some(Self::Azure),
            "http" | "https" => Some(Self::Http),
            _ => None,
        }
    }

    /// What messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::S3 => "S3",
            Self::Gcs => "Google Cloud Storage",
            Self::Azure => "Azure",
            Self::Http => "the web server",
        }
    }
}

/// Where something lies in a store. What is shown of it has no user, no password and no signature.
#[derive(Clone)]
pub struct Address {
    /// The kind of store.
    pub kind: Kind,
    /// The URL up to its path, without user and password: `s3://bucket`, `https://host:port`.
    pub root: String,
    /// The bucket or container; of a web server its host.
    pub bucket: String,
    /// The path within the store.
    pub path: ObjectPath,
    /// The user and the password that the URL has.
    pub user: Option<(String, String)>,
    /// What follows the `?` of a web server's URL, which signs it.
    pub query: Option<String>,
}

impl std::fmt::Debug for Address {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.shown(&self.path))
    }
}

/// Whether a text is the URL of a store, rather than a path.
pub fn is_url(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| Kind::of_scheme(scheme).is_some())
}

impl Address {
    /// Takes a URL apart.
    ///
    /// # Errors
    /// [`Error::Argument`] for what is no URL of a store.
    pub fn parse(text: &str) -> Result<Self> {
        let (scheme, rest) = text.split_once("://").unwrap_or((text, ""));
        let Some(kind) = Kind::of_scheme(scheme) else {
            return Err(Error::Argument(format!(
                "{scheme}:// is no store that is known; these are s3, gs, az, http and https"
            )));
        };
        if kind == Kind::Http {
            return Self::of_web(text);
        }
        let (authority, key) = rest.split_once('/').unwrap_or((rest, ""));
        // abfss://container@account.dfs.core.windows.net/…: what stands before the @ is no secret.
        let is_container = kind == Kind::Azure && authority.contains(".core.");
        let (user, bucket) = match authority.rsplit_once('@') {
            Some((user, bucket)) if !is_container => (Some(user_of(user)), bucket),
            _ => (None, authority),
        };
        if bucket.is_empty() {
            return Err(Error::Argument(format!("{scheme}:// names no bucket")));
        }
        let root = format!("{scheme}://{bucket}");
        // Slashes at the end, and two in a row, as users type them.
        let parts = key.split('/').filter(|part| !part.is_empty());
        let key = parts.collect::<Vec<_>>().join("/");
        let path = ObjectPath::parse(&key).map_err(|error| {
            Error::Argument(format!("{root}/{key}: is no name in a store: {error}"))
        })?;
        Ok(Self { kind, root, bucket: bucket.to_owned(), path, user, query: None })
    }

    fn of_web(text: &str) -> Result<Self> {
        // The text may have a password in it.
        let broken =
            |reason: String| Error::Argument(format!("a URL of http is not one: {reason}"));
        let url = Url::parse(text).map_err(|error| broken(error.to_string()))?;
        let decoded = |text: &str| percent_decoded(text);
        let user = (!url.username().is_empty() || url.password().is_some())
            .then(|| (decoded(url.username()), decoded(url.password().unwrap_or_default())));
        let host = url.host_str().ok_or_else(|| broken("it names no host".to_owned()))?.to_owned();
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let path =
            ObjectPath::from_url_path(url.path()).map_err(|error| broken(error.to_string()))?;
        Ok(Self {
            kind: Kind::Http,
            root: format!("{}://{host}{port}", url.scheme()),
            bucket: host,
            path,
            user,
            query: url.query().filter(|query| !query.is_empty()).map(str::to_owned),
        })
    }

    /// What messages and reports call an object.
    pub fn shown(&self, path: &ObjectPath) -> String {
        let path: &str = path.as_ref();
        if path.is_empty() { self.root.clone() } else { format!("{}/{path}", self.root) }
    }

    /// What messages and reports call all of it.
    pub fn name(&self) -> PathBuf {
        PathBuf::from(self.shown(&self.path))
    }

    /// The address of what lies below it.
    #[must_use]
    pub fn at(&self, path: ObjectPath) -> Self {
        Self { path, ..self.clone() }
    }

    /// Whether one of two addresses lies within the other, or both are the same.
    pub fn overlaps(&self, other: &str) -> bool {
        let own = format!("{}/", self.shown(&self.path));
        let other = format!("{}/", other.trim_end_matches('/'));
        own.starts_with(&other) || other.starts_with(&own)
    }

    /// Whether the host is this machine.
    pub fn is_loopback(text: &str) -> bool {
        let Ok(url) = Url::parse(text) else { return false };
        match url.host() {
            Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        }
    }
}

fn user_of(text: &str) -> (String, String) {
    let (name, password) = text.split_once(':').unwrap_or((text, ""));
    (percent_decoded(name), percent_decoded(password))
}

/// A text with `%2F` and the like as what they stand for.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        decoded.push(code.unwrap_or(bytes[at]));
        at += if code.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart_and_shown_without_its_password() {
        for (text, shown, bucket, path) in [
            ("s3://models/llama/", "s3://models/llama", "models", "llama"),
            ("s3://key:se%2Fcret@models//a//b", "s3://models/a/b", "models", "a/b"),
            ("gs://models", "gs://models", "models", ""),
            ("az://box/a b#1", "az://box/a b#1", "box", "a b#1"),
            ("http://me:pw@host:81/a%20b/", "http://host:81/a b", "host", "a b"),
            ("https://host/a?X-Amz-Signature=secret", "https://host/a", "host", "a"),
        ] {
            let address = Address::parse(text).expect("a URL");
            assert_eq!(address.shown(&address.path), shown);
            assert_eq!((address.bucket.as_str(), address.path.as_ref()), (bucket, path));
            let all = format!("{address:?} {}", address.name().display());
            assert!(!all.contains("cret") && !all.contains("pw"), "{all}");
        }
        let with_user = Address::parse("s3://key:se%2Fcret@models/a").expect("a URL");
        assert_eq!(with_user.user, Some(("key".to_owned(), "se/cret".to_owned())));
        let signed = Address::parse("https://host/a?sig=se%2Fcret").expect("a URL");
        assert_eq!(signed.query.as_deref(), Some("sig=se%2Fcret"));
        for text in ["ftp://host/a", "s3:///a", "http://?sig=secret"] {
            let error = Address::parse(text).expect_err("none").to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn an_output_within_an_input_is_known() {
        let address = Address::parse("s3://b/models/out").expect("a URL");
        assert!(address.overlaps("s3://b/models") && address.overlaps("s3://b/models/out/x"));
        assert!(!address.overlaps("s3://b/models/output") && !address.overlaps("/b/models/out"));
    }
}
