package dev.pagewire.example;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.QuotaFailure;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;

/**
 * A call that did not end well: its status, and the google.rpc details that came with it.
 *
 * @param violations BadRequest: what is wrong with which field
 * @param quotas QuotaFailure: whose quota is used up
 * @param retryAfter RetryInfo: when to come back; zero where the server does not say
 * @param reason ErrorInfo: a stable word for programs
 */
record Refusal(
    Status.Code code,
    String message,
    List<String> violations,
    List<String> quotas,
    Duration retryAfter,
    String reason) {

  static Refusal of(Throwable error) {
    Status status = Status.fromThrowable(error); // UNKNOWN for what is no status
    String message = status.getDescription() == null ? error.toString() : status.getDescription();
    if (error.getCause() != null) {
      message += " (" + error.getCause().getMessage() + ")";
    }
    List<String> violations = new ArrayList<>();
    List<String> quotas = new ArrayList<>();
    Duration retryAfter = Duration.ZERO;
    String reason = "";
    com.google.rpc.Status answered = StatusProto.fromThrowable(error);
    List<Any> details = answered == null ? List.of() : answered.getDetailsList();
    try {
      for (Any detail : details) {
        if (detail.is(BadRequest.class)) {
          detail.unpack(BadRequest.class).getFieldViolationsList()
              .forEach(v -> violations.add(v.getField() + ": " + v.getDescription()));
        } else if (detail.is(QuotaFailure.class)) {
          detail.unpack(QuotaFailure.class).getViolationsList()
              .forEach(v -> quotas.add(v.getSubject() + ": " + v.getDescription()));
        } else if (detail.is(RetryInfo.class)) {
          var delay = detail.unpack(RetryInfo.class).getRetryDelay();
          retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
        } else if (detail.is(ErrorInfo.class)) {
          reason = detail.unpack(ErrorInfo.class).getReason();
        }
      }
    } catch (InvalidProtocolBufferException malformed) {
      message += " (its details cannot be read: " + malformed.getMessage() + ")";
    }
    return new Refusal(status.getCode(), message, violations, quotas, retryAfter, reason);
  }

  @Override
  public String toString() {
    String text = reason.isEmpty() ? code.toString() : code + " " + reason;
    if (!violations.isEmpty()) {
      text += ": " + String.join("; ", violations);
    } else {
      text += ": " + (quotas.isEmpty() ? message : String.join("; ", quotas));
    }
    return retryAfter.isZero() ? text : text + "; try again in " + retryAfter.toMillis() + " ms";
  }
}
