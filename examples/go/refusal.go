package main

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A call that did not end well: its status, and the google.rpc details that came with it.
type refusal struct {
	code       codes.Code
	message    string
	violations []string      // BadRequest: what is wrong with which field
	quotas     []string      // QuotaFailure: whose quota is used up
	retryAfter time.Duration // RetryInfo: when to come back; 0 where the server does not say
	reason     string        // ErrorInfo: a stable word for programs
}

func refusalOf(err error) refusal {
	answered := status.Convert(err) // UNKNOWN for what is no status
	r := refusal{code: answered.Code(), message: answered.Message()}
	for _, detail := range answered.Details() {
		switch detail := detail.(type) {
		case *errdetails.BadRequest:
			for _, v := range detail.GetFieldViolations() {
				r.violations = append(r.violations, v.GetField()+": "+v.GetDescription())
			}
		case *errdetails.QuotaFailure:
			for _, v := range detail.GetViolations() {
				r.quotas = append(r.quotas, v.GetSubject()+": "+v.GetDescription())
			}
		case *errdetails.RetryInfo:
			r.retryAfter = detail.GetRetryDelay().AsDuration()
		case *errdetails.ErrorInfo:
			r.reason = detail.GetReason()
		}
	}
	return r
}

func (r refusal) String() string {
	text := r.code.String()
	if r.reason != "" {
		text += " " + r.reason
	}
	switch {
	case len(r.violations) > 0:
		text += ": " + strings.Join(r.violations, "; ")
	case len(r.quotas) > 0:
		text += ": " + strings.Join(r.quotas, "; ")
	default:
		text += ": " + r.message
	}
	if r.retryAfter > 0 {
		text += fmt.Sprintf("; try again in %v", r.retryAfter)
	}
	return text
}

// Checks that a call ended with `code`, and returns what came with it.
func expect(code codes.Code, err error) (refusal, error) {
	if err == nil {
		return refusal{}, fmt.Errorf("it ended well instead of with %v", code)
	}
	if r := refusalOf(err); r.code == code {
		return r, nil
	}
	return refusal{}, err
}
